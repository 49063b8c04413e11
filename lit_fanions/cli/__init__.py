"""The command line: the Lightning CLI, its errors, reports, and trainings as child processes."""
