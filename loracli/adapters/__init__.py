"""What comes in: references and the Hub, PEFT's files and names, what is honoured and what is refused."""
