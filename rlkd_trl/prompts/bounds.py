"""What one rendering of a template may take."""

CPU_SECONDS = 1.0
MEMORY_BYTES = 768 * 2**20  # of the whole process that renders, of which Python and Jinja take some 50 MB
WALL_SECONDS = 60.0  # in case that process does not get its time
