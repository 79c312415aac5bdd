"""A person's decisions about the clusters of a run, and what is made of them."""
