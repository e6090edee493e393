"""The laboratory: children of the real tree that misbehave on request.  Nothing else imports it."""
