"""Every equation of the package: tensors and scalars in, tensors out. Imports torch only."""
