"""What the package uses of other libraries' private parts: one file for each library, each with a test."""
