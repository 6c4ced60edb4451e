"""What a run may claim: sampling <- accounting <- plan <- ledger <- mechanism (imports go left only)."""
