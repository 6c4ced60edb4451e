"""The generated world of the embedded model: its facts, its subjects, and the text that is made of them."""
