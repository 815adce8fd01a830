"""A study: named methods, each with its learning rate tuned alike, trained with several seeds and compared."""
