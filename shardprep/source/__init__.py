"""What is to be packed: the data set, its files and the matrices in them."""
