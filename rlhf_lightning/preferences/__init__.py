"""The human side: candidates to judge, the page and the store, agreement, votes; and a simulated annotator."""
