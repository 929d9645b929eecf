"""What jobs, plans and figures look like to people: tables as data, on a terminal, in a notebook."""
