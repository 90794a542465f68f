"""Pure functions from facts about routers, or samples of them, to factors."""
