"""What every command and every room uses: errors, the command line, progress, files, plotting."""
