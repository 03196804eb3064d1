//! A Zipf workload on two hosts: a few keys get most requests, with writes in between.

use std::collections::HashMap;
use std::sync::Mutex;

use futures::StreamExt;
use oncely::model::invalidation::Invalidation;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use support::database::Kind;

use super::*;
use crate::positions::DeliveryHarness;

const KEYS: usize = 1_000;
const REQUESTS: usize = 60_000;

/// One write per this many requests.
const WRITES_ONE_IN: usize = 400;

/// Counts of the requests by layer.
#[derive(Debug, Default)]
struct Tally {
    layers: HashMap<&'static str, usize>,
    writes: usize,
    database_reads: Arc<AtomicUsize>,
}

/// Two hosts with one Redis over a table.
struct Shop {
    harness: DeliveryHarness,
    hosts: [Cache; 2],
    /// The last committed version by article.
    committed: Mutex<Vec<i64>>,
}

impl Shop {
    async fn read(&self, host: usize, article: usize, reads: &Arc<AtomicUsize>) -> Result<Layer> {
        let least = self.committed.lock().unwrap()[article];
        let (database, reads) = (self.harness.database.clone(), Arc::clone(reads));
        let load = move || async move {
            reads.fetch_add(1, Ordering::Relaxed);
            let sql = format!("select amount from app.balance where account = 'a{article}'");
            let amount = database.number(&sql).await?;
            Ok(Loaded::cacheable(
                Bytes::from(amount.to_string()),
                vec![format!("a{article}")],
                LONG,
            ))
        };
        let answer = self.hosts[host]
            .get_or_load(&key(&format!("a{article}")), load)
            .await?;
        let seen: i64 = text(&answer).parse()?;
        assert!(
            seen >= least,
            "article {article} is {seen} on host {host} after {least} was committed"
        );
        Ok(answer.layer)
    }

    /// Commits a write; it is visible on all hosts after they received its invalidation.
    async fn write(&self, host: usize, article: usize) -> Result<()> {
        let amount = self.committed.lock().unwrap()[article] + 1;
        let sql = format!("update app.balance set amount = {amount} where account = 'a{article}'");
        self.harness.database.execute(&sql).await?;
        let tag = format!("a{article}");
        self.hosts[host].invalidate("shop", [tag.clone()]).await;
        let invalidation = Invalidation::new("shop", [tag].into(), jiff::Timestamp::now());
        self.hosts[1 - host].apply_invalidation(&invalidation).await;
        self.committed.lock().unwrap()[article] = amount;
        Ok(())
    }
}

both!(
    a_zipf_workload_is_answered_95_percent_from_the_cache,
    |kind: Kind| async move {
        let redis = Redis::start().await?;
        let harness = DeliveryHarness::new(kind, "").await?;
        let rows: Vec<String> = (0..KEYS)
            .map(|article| format!("('a{article}', 0)"))
            .collect();
        harness
            .database
            .execute(&format!(
                "insert into app.balance (account, amount) values {}",
                rows.join(", ")
            ))
            .await?;

        // One tenth of all keys fits into the local cache.
        let small = CacheSettings {
            size: 40_000,
            ..settings(Some(&redis))?
        };
        let hosts = [
            Cache::open(&small, Arc::default())?,
            Cache::open(&small, Arc::default())?,
        ];
        let shop = Shop {
            harness,
            hosts,
            committed: Mutex::new(vec![0; KEYS]),
        };

        // Workload
        let zipf = WeightedIndex::new((1..=KEYS).map(|rank| 1.0 / rank as f64))?;
        let mut random = StdRng::seed_from_u64(7);
        let mut tally = Tally::default();
        let requests: Vec<(usize, usize, bool)> = (0..REQUESTS)
            .map(|n| {
                (
                    random.random_range(0..2),
                    zipf.sample(&mut random),
                    n % WRITES_ONE_IN == 0,
                )
            })
            .collect();
        tally.writes = requests.iter().filter(|(_, _, writes)| *writes).count();

        // Requests, with one write at a time
        let (shop, reads) = (&shop, &tally.database_reads);
        let write = tokio::sync::Mutex::new(());
        let write = &write;
        let mut answers = futures::stream::iter(requests)
            .map(|(host, article, writes)| async move {
                if !writes {
                    return shop.read(host, article, reads).await.map(Some);
                }
                let _one_at_a_time = write.lock().await;
                shop.write(host, article).await.map(|()| None)
            })
            .buffer_unordered(16);
        let mut layers = HashMap::new();
        while let Some(layer) = answers.next().await {
            if let Some(layer) = layer? {
                *layers.entry(layer.as_str()).or_default() += 1;
            }
        }
        drop(answers);
        tally.layers = layers;

        // Share of each layer
        let share = |count: usize| count as f64 / REQUESTS as f64;
        let hits: usize = ["local", "shared"]
            .iter()
            .filter_map(|layer| tally.layers.get(layer))
            .sum();
        let database_reads = tally.database_reads.load(Ordering::Relaxed);
        println!(
            "{tally:?}: {:.2} % hits, {:.2} % database reads",
            share(hits) * 100.0,
            share(database_reads) * 100.0
        );
        assert!(
            share(hits) >= 0.95 && share(database_reads) < 0.05,
            "{tally:?}"
        );
        assert!(
            tally.layers.values().all(|count| *count > 0) && tally.layers.len() == 3,
            "{tally:?}"
        );
        Ok(())
    }
);
