"""Export a rule, with its context computation, to formats that need no Python."""
