"""What an update costs, and what it buys: everything here runs with one command."""
