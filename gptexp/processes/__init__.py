"""The processes of a command: what they print, how they meet, and how they end."""
