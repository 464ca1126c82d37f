-- The store of `keel rank`. Each statement is idempotent, because two processes may create the same store at once.

CREATE TABLE IF NOT EXISTS items (
    number    INTEGER PRIMARY KEY,
    key       TEXT NOT NULL UNIQUE,      -- hash of prompt and responses
    prompt    TEXT NOT NULL,             -- JSON: a text, or chat messages
    responses TEXT NOT NULL,             -- JSON: list of texts
    source    TEXT NOT NULL
);

CREATE TABLE IF NOT EXISTS raters (
    name  TEXT PRIMARY KEY NOT NULL,
    token TEXT NOT NULL UNIQUE           -- in the private link
);

-- Settings of the study, which stay in force until a later `keel rank` changes them.
CREATE TABLE IF NOT EXISTS study (
    name  TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL                  -- JSON
);

-- Which write-ahead log belongs to this file (log_marks.py). Each write changes the row, so each log contains it.
CREATE TABLE IF NOT EXISTS log (
    only     INTEGER PRIMARY KEY CHECK (only = 1),
    id       TEXT NOT NULL,              -- random, new for each log
    previous TEXT NOT NULL,              -- id of the preceding log
    open     INTEGER NOT NULL CHECK (open IN (0, 1)),  -- whether the log may hold changes that this file lacks
    changes  INTEGER NOT NULL            -- number of transactions that wrote
);

CREATE TABLE IF NOT EXISTS owner (
    only  INTEGER PRIMARY KEY CHECK (only = 1),
    token TEXT NOT NULL
);

-- An item assigned to a rater. Open until the rater judges it, or until an undo opens another deal of that rater.
CREATE TABLE IF NOT EXISTS deals (
    id       TEXT PRIMARY KEY NOT NULL,
    item     INTEGER NOT NULL REFERENCES items (number),
    rater    TEXT NOT NULL REFERENCES raters (name),
    shown    TEXT NOT NULL,              -- JSON: indices of the responses, top first
    dealt_at REAL NOT NULL,              -- seconds since 1970
    open     INTEGER NOT NULL DEFAULT 1 CHECK (open IN (0, 1))
);
CREATE UNIQUE INDEX IF NOT EXISTS one_open_deal ON deals (rater) WHERE open = 1;
CREATE INDEX IF NOT EXISTS held_items ON deals (item) WHERE open = 1;

-- The judgements. Rows are never deleted: an undo sets withdrawn_at.
CREATE TABLE IF NOT EXISTS judgements (
    number       INTEGER PRIMARY KEY,    -- in order of submission
    deal         TEXT NOT NULL UNIQUE REFERENCES deals (id),
    item         INTEGER NOT NULL REFERENCES items (number),
    rater        TEXT NOT NULL REFERENCES raters (name),
    ranks        TEXT,                   -- JSON: one rank per response, 1 is best; NULL = cannot judge
    comment      TEXT NOT NULL,
    tags         TEXT NOT NULL,          -- JSON: list of texts
    seconds      REAL NOT NULL,
    made_at      TEXT NOT NULL,          -- ISO 8601, UTC
    withdrawn_at TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS one_word_each ON judgements (item, rater) WHERE withdrawn_at IS NULL;
CREATE INDEX IF NOT EXISTS words_of_a_rater ON judgements (rater, number);
