"""From chapters to what is published: execute, build, check, claims, PDF, archive, hub."""
