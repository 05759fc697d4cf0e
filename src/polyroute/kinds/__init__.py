"""How families of base models read examples, learn from them and answer."""
