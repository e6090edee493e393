"""The control plane: accounts, logins, sessions, hubs, bridges."""
