"""What every room uses: events, files, locks of forked processes, checks of values, YAML."""
