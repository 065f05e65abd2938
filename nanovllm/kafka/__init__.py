"""How brokers are spoken to: clients, records, transactions, topics."""
