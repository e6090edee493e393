"""The watchdog on Windows: the same decisions, spawned children, a job, sockets for pipes."""
