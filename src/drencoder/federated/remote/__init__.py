"""What every transport to other machines shares: sites, what they refuse, messages, timeouts and the list of nodes."""
