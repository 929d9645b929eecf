"""A pair at work: what prefill hands over to decode, and what that costs."""
