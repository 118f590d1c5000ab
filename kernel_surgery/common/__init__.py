"""Code that every room uses: errors, the command line, the environment record, files, progress bars, plotting."""
