"""What runs a recipe: flags, data, checks, results, the comparison and the embedded demo."""
