"""What the audit's study of broken mechanisms is made of."""
