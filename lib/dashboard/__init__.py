"""Every head on one page: collect the numbers, render them into one HTML file."""
