"""The commands, and what they show. Everything here calls the rooms below; nothing below imports this room."""
