"""Our client against a scripted server, and against the real one."""
