"""What other supervisors supervise, and the floors that none of them can go below."""
