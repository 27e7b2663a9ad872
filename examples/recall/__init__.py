"""What a model remembers against how much state it keeps: recall of pairs, and text."""
