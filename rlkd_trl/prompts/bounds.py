"""How much time and memory one rendering of a template may take."""

CPU_SECONDS = 1.0
MEMORY_BYTES = 768 * 2**20  # for the whole process that renders, of which Python and Jinja take some 50 MB
WALL_SECONDS = 60.0  # a second bound, for when that process gets no CPU time
