"""The human side, here simulated: candidates to compare, and who compares them."""
