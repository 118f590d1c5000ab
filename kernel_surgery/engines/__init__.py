"""The edit in engines that people serve with, and in clusters of processes."""
