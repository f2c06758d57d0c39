"""SGLang as a supervised child process, and the thin client that talks to it."""
