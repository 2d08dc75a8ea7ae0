"""A small laboratory: a tiny language model post-trained in four stages, with real interference between them."""
