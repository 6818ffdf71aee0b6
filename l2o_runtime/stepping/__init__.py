"""How a rule is run over the parameters of a model: flat parts of them, in chunks, over ranks."""
