"""Pure functions that compute factors from facts about routers, or from samples of them."""
