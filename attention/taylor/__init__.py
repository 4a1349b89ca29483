"""Taylor attention: exp(q·k) as a truncated power series over unique monomials."""
