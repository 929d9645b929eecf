"""What goes on beside requests: the reconciler, webhooks, and handing finished jobs on."""
