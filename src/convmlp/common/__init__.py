"""What all commands share: errors and exit codes, the parser, configs, files and locks, signals, devices, images."""
