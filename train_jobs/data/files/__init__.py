"""How files of each kind are read: rows of columns and values, or what is wrong with them."""
