"""What recipes consist of: flags, data, checks, results; the comparison, the embedded demo, the console command."""
