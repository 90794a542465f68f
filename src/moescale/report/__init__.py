"""Shows plans and results: in the terminal, as a page and in a notebook."""
