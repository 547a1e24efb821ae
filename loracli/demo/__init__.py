"""The whole story on an embedded example: a small model, two adapters, a task that neither solves alone."""
