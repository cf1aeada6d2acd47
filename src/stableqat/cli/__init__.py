"""The command line: `main` (the command and its verbs), `lightning` (fit, validate, test)."""
