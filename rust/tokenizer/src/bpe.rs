//! Byte-pair encoding over tables of few bytes a token.
//!
//! The `tokenizers` library keeps each token as texts of their own, twice, and builds them from others: for the
//! 248,044 tokens of the released models 60 MB, and half of the time in which a model starts. Its results
//! are what tests compare these with.

use ahash::{AHashMap, RandomState};
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Ids are 32-bit integers with a sign elsewhere.
pub const MAX_ID: u32 = i32::MAX as u32;

/// The id of a symbol that has become part of the one before it.
const MERGED: u32 = u32::MAX;

/// Tokens, and pairs of them that become one.
pub struct Bpe {
    tokens: Tokens,
    merges: AHashMap<(u32, u32), Merge>,
}

/// Texts and ids of tokens. A token's place is its number in the order of ids, which may have gaps.
#[derive(Default)]
struct Tokens {
    ids: Vec<u32>,
    /// Where each token's text ends in `texts`.
    ends: Vec<u32>,
    texts: String,
    /// Places by text.
    places: HashTable<u32>,
    hashes: RandomState,
}

#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    id: u32,
}

/// Part of a word: a token with its neighbours' places, beyond the word's end where there is none.
struct Symbol {
    id: u32,
    previous: usize,
    next: usize,
}

/// A pair that may become one: its rank and its first symbol's place. Lower ranks go first, then earlier
/// places.
type Candidate = Reverse<(u32, usize)>;

/// Work space of `Bpe::encode`.
#[derive(Default)]
pub struct Scratch {
    symbols: Vec<Symbol>,
    candidates: BinaryHeap<Candidate>,
}

impl Bpe {
    /// `vocab`: texts and ids. `merges`: pairs of tokens, by rank, whose texts one after the other are a token,
    /// too; of several entries of one pair the last counts. Errors say what is wrong with them.
    pub fn new<'a>(
        vocab: impl IntoIterator<Item = (&'a str, u32)>,
        merges: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Bpe, String> {
        let tokens = Tokens::new(vocab)?;
        let missing = |text: &str| format!("merges: no token {text:?}");
        let id = |text: &str| tokens.id(text).ok_or_else(|| missing(text));
        let merges = merges.into_iter();
        let mut by_ids = AHashMap::with_capacity(merges.size_hint().0);
        let mut joined = String::new();
        let mut place = 0;
        for (rank, (left, right)) in merges.enumerate() {
            let pair = (id(left)?, id(right)?);
            joined.clear();
            joined.extend([left, right]);
            // In trained vocabularies most merges make tokens in the order of their ids.
            let next = place + 1;
            place = if next < tokens.ids.len() as u32 && tokens.text(next) == joined {
                next
            } else {
                tokens.place(&joined).ok_or_else(|| missing(&joined))?
            };
            let rank = u32::try_from(rank).map_err(|_| "merges: more than 2^32")?;
            by_ids.insert(pair, Merge { rank, id: tokens.ids[place as usize] });
        }
        Ok(Bpe { tokens, merges: by_ids })
    }

    /// Appends the ids of `word` to `ids`. Characters that are no token are left out, as the library does
    /// without a token for unknown ones.
    pub fn encode(&self, word: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let Scratch { symbols, candidates } = scratch;
        symbols.clear();
        candidates.clear();
        for (place, id) in self.characters(word).enumerate() {
            symbols.push(Symbol { id, previous: place.wrapping_sub(1), next: place + 1 });
        }
        candidates.extend((0..symbols.len()).filter_map(|first| self.candidate(symbols, first)));
        while let Some(Reverse((rank, first))) = candidates.pop() {
            // Either symbol may have become part of another one since.
            let Some(merge) = self.merge(symbols, first).filter(|merge| merge.rank == rank) else {
                continue;
            };
            let second = symbols[first].next;
            let (previous, next) = (symbols[first].previous, symbols[second].next);
            symbols[second].id = MERGED;
            symbols[first] = Symbol { id: merge.id, previous, next };
            if let Some(next) = symbols.get_mut(next) {
                next.previous = first;
            }
            candidates.extend(self.candidate(symbols, first));
            candidates.extend(self.candidate(symbols, previous));
        }
        ids.extend(symbols.iter().map(|symbol| symbol.id).filter(|id| *id != MERGED));
    }

    fn candidate(&self, symbols: &[Symbol], first: usize) -> Option<Candidate> {
        self.merge(symbols, first).map(|merge| Reverse((merge.rank, first)))
    }

    /// What the symbol at `first` and its next one become, if they are there and become one.
    fn merge(&self, symbols: &[Symbol], first: usize) -> Option<Merge> {
        let left = symbols.get(first)?;
        let right = symbols.get(left.next)?;
        self.merges.get(&(left.id, right.id)).copied()
    }

    fn characters(&self, word: &str) -> impl Iterator<Item = u32> {
        word.char_indices()
            .filter_map(|(start, char)| self.id(&word[start..start + char.len_utf8()]))
    }

    /// The id of the token `text`.
    pub fn id(&self, text: &str) -> Option<u32> {
        self.tokens.id(text)
    }

    /// The text of token `id`.
    pub fn token(&self, id: u32) -> Option<&str> {
        let place = self.tokens.ids.binary_search(&id).ok()?;
        Some(self.tokens.text(place as u32))
    }

    /// All tokens, by id.
    pub fn tokens(&self) -> impl Iterator<Item = (&str, u32)> {
        (0..).zip(&self.tokens.ids).map(|(place, id)| (self.tokens.text(place), *id))
    }

    /// The largest id + 1.
    pub fn size(&self) -> u32 {
        self.tokens.ids.last().map_or(0, |id| id + 1)
    }

    /// Pairs of tokens that become one, by rank.
    pub fn merges(&self) -> Vec<(&str, &str)> {
        let mut ranked: Vec<_> =
            self.merges.iter().map(|(pair, merge)| (merge.rank, *pair)).collect();
        ranked.sort_unstable();
        let texts = |(_, (left, right))| Some((self.token(left)?, self.token(right)?));
        ranked.into_iter().filter_map(texts).collect()
    }
}

impl Tokens {
    fn new<'a>(vocab: impl IntoIterator<Item = (&'a str, u32)>) -> Result<Tokens, String> {
        let mut vocab: Vec<(&str, u32)> = vocab.into_iter().collect();
        vocab.sort_by_key(|(_, id)| *id);
        if let Some(pair) = vocab.windows(2).find(|pair| pair[0].1 == pair[1].1) {
            return Err(format!("{:?} and {:?} have one id", pair[0].0, pair[1].0));
        }
        if let Some((text, id)) = vocab.last().filter(|(_, id)| *id > MAX_ID) {
            return Err(format!("{text:?} has the id {id}"));
        }
        let mut tokens = Tokens {
            ids: vocab.iter().map(|(_, id)| *id).collect(),
            ends: Vec::with_capacity(vocab.len()),
            texts: String::with_capacity(vocab.iter().map(|(text, _)| text.len()).sum()),
            ..Tokens::default()
        };
        for (text, _) in &vocab {
            tokens.texts.push_str(text);
            let end = u32::try_from(tokens.texts.len());
            tokens.ends.push(end.map_err(|_| "more than 4 GiB of tokens")?);
        }
        let mut places = HashTable::with_capacity(vocab.len());
        for (place, (text, _)) in (0..).zip(vocab) {
            let equal = |other: &u32| tokens.text(*other) == text;
            let rehash = |other: &u32| tokens.hashes.hash_one(tokens.text(*other));
            match places.entry(tokens.hashes.hash_one(text), equal, rehash) {
                Entry::Vacant(entry) => entry.insert(place),
                Entry::Occupied(_) => return Err(format!("{text:?} has two ids")),
            };
        }
        tokens.places = places;
        Ok(tokens)
    }

    /// The text of the token at `place`, which is below their number.
    fn text(&self, place: u32) -> &str {
        let place = place as usize;
        let start = if place == 0 { 0 } else { self.ends[place - 1] };
        &self.texts[start as usize..self.ends[place] as usize]
    }

    /// The place of the token `text`.
    fn place(&self, text: &str) -> Option<u32> {
        let equal = |place: &u32| self.text(*place) == text;
        self.places.find(self.hashes.hash_one(text), equal).copied()
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.place(text).map(|place| self.ids[place as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qdelta_core::random::Random;
    use tokenizers::Model;
    use tokenizers::models::bpe::BPE;

    type Vocab = Vec<(String, u32)>;
    type Merges = Vec<(String, String)>;

    /// Tokens of a few letters, some with gaps between their ids, and merges of them in any order: ranks
    /// need not grow with length, as they do in trained vocabularies.
    fn random_tables(random: &mut Random) -> (Vocab, Merges) {
        let mut texts: Vec<String> = ["a", "b", "c", "é", "世"].map(str::to_owned).into();
        let mut merges = Vec::new();
        for _ in 0..random.below(60) {
            let [left, right] = [(); 2].map(|()| texts[random.below(texts.len())].clone());
            let joined = format!("{left}{right}");
            if !texts.contains(&joined) {
                texts.push(joined);
            }
            merges.push((left, right));
        }
        for last in (1..merges.len()).rev() {
            merges.swap(last, random.below(last + 1));
        }
        let gaps = random.below(3) as u32 + 1;
        let ids = texts.into_iter().zip(0..).map(|(text, place)| (text, place * gaps));
        (ids.collect(), merges)
    }

    fn tables(vocab: &[(String, u32)], merges: &[(String, String)]) -> Result<Bpe, String> {
        Bpe::new(
            vocab.iter().map(|(text, id)| (text.as_str(), *id)),
            merges.iter().map(|(left, right)| (left.as_str(), right.as_str())),
        )
    }

    #[test]
    fn words_are_encoded_as_by_the_library() {
        let mut random = Random::new(1);
        let mut scratch = Scratch::default();
        for _ in 0..300 {
            let (vocab, merges) = random_tables(&mut random);
            let bpe = tables(&vocab, &merges).unwrap();
            let library = BPE::builder()
                .vocab_and_merges(vocab.iter().cloned().collect::<AHashMap<_, _>>(), merges)
                .build()
                .unwrap();
            for _ in 0..50 {
                let length = random.below(40);
                // The last letter is no token.
                let letters = (0..length).map(|_| ['a', 'b', 'c', 'é', '世', 'x'][random.below(6)]);
                let word: String = letters.collect();
                let mut ids = Vec::new();
                bpe.encode(&word, &mut scratch, &mut ids);
                let want: Vec<u32> =
                    library.tokenize(&word).unwrap().iter().map(|token| token.id).collect();
                assert_eq!(ids, want, "{word}");
            }
        }
    }

    #[test]
    fn tables_are_kept_whole() {
        let mut random = Random::new(2);
        for _ in 0..100 {
            let (vocab, merges) = random_tables(&mut random);
            let bpe = tables(&vocab, &merges).unwrap();
            for (text, id) in &vocab {
                assert_eq!(bpe.token(*id), Some(text.as_str()));
            }
            assert_eq!(bpe.size(), vocab.last().unwrap().1 + 1);
            assert_eq!(bpe.token(bpe.size()), None);
            assert!(bpe.tokens().eq(vocab.iter().map(|(text, id)| (text.as_str(), *id))));
            // Of a pair that is there twice, the last place counts.
            let mut last: Vec<&(String, String)> = Vec::new();
            for merge in merges.iter().rev() {
                if !last.contains(&merge) {
                    last.push(merge);
                }
            }
            last.reverse();
            let kept: Vec<_> = last.iter().map(|(l, r)| (l.as_str(), r.as_str())).collect();
            assert_eq!(bpe.merges(), kept);
        }
    }

    #[test]
    fn tables_that_contradict_are_refused() {
        let error = |vocab: &[(&str, u32)], merges: &[(&str, &str)]| {
            Bpe::new(vocab.iter().copied(), merges.iter().copied()).err().unwrap()
        };
        assert_eq!(error(&[("a", 1), ("a", 2)], &[]), r#""a" has two ids"#);
        assert_eq!(error(&[("a", 1), ("b", 1)], &[]), r#""a" and "b" have one id"#);
        assert_eq!(error(&[("a", 0)], &[("a", "b")]), r#"merges: no token "b""#);
        assert_eq!(error(&[("a", 0)], &[("a", "a")]), r#"merges: no token "aa""#);
        assert_eq!(error(&[("a", u32::MAX)], &[]), r#""a" has the id 4294967295"#);
    }
}
