"""One file a command; each holds a click command named `command` and imports the heavy parts when it runs."""
