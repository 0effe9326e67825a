"""Tools of every room: events, files, locks of forked processes, checks of values, YAML."""
