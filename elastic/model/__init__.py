"""What a framework and a model must offer: protocols, the kernels that models are written in, and what users' own code gives back."""
